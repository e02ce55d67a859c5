"""AlexNet as the paper's text has it: the base itself, where the text is silent as in the authors' 2012 code."""

from ml_collections import ConfigDict

from configs import base


def get_config(scale: str = "imagenet2012") -> ConfigDict:
    return base.get_config(scale)
