"""Quantize: the member of a network's orbit that loses least when its numbers are rounded.

Takes a model, example inputs, a scheme and calibration data. Gives a copy, and the record of what rounding costs before and
after. Never imports training or cli.
"""

from equinorm.quantization.scheme import Scheme

__all__ = ["Scheme"]
