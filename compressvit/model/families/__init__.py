"""Families of backbones: one file a family, with everything compressvit knows of it (`compressvit.model.family.Family`)."""
