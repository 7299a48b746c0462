"""What several test files need and no fixture is; `tests/conftest.py` has the fixtures."""
