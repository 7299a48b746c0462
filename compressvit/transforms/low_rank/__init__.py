"""Low rank alone: each linear layer becomes two smaller ones, fitted to the teacher within a budget."""
