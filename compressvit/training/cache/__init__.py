"""A teacher that is asked once: its answers to every image in every view, in files that other runs read.

`spec.py` has the section of a recipe, `form.py` how an answer is bytes, `store.py` the files, `identity.py` what answers depend on, and
`cache.py` stands before the teacher in training.
"""
