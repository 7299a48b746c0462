"""The programs of `compressvit tool`, one file per program in `programs/tools/`, and what they share"""
