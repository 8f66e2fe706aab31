"""Training and evaluation of sequential recommenders, as processes of their own.

Nothing is imported here, so that `training.config` and `training.checkpoint.read_manifest` stay
usable where torch must not be loaded.
"""
