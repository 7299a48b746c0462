"""Families of backbones: one file per family, with everything compressvit knows about it (`compressvit.model.family.Family`)."""
