"""What is computed once: a teacher's answers, or frozen features, of every image in every view, in files that other runs read.

`spec.py` has the sections of a recipe, `form.py` how an answer is bytes, `store.py` the files, `identity.py` what answers depend on,
`cache.py` stands before the teacher in training, and `features.py` before what is frozen of the trained model.
"""
