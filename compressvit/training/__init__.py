"""Training loop, phases and loss terms: the task's loss, and those of distillation, which compare student and teacher."""
