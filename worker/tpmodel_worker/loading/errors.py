"""What goes wrong with the files of a checkpoint."""


class CheckpointError(Exception):
    """A checkpoint's files are not what the model needs; the message names file and tensor."""
