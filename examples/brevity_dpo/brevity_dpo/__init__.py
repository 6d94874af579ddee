"""A project of its own on top of sdpo-lightning."""
