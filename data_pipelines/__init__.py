"""Before training: text in, packed rows out. Run modules from the repository root, `python -m data_pipelines.build`."""
