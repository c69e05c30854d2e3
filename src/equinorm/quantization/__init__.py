"""Quantize: networks brought into the form in which quantizers round them, and the scales at which that costs least.

Takes a model, example inputs, a scheme and calibration data. Gives a copy, and the record of what was done to it. Never
imports training or cli.
"""

from equinorm.quantization.clamp import Clamp
from equinorm.quantization.freeing import settle_
from equinorm.quantization.prepare import Preparation, prepare
from equinorm.quantization.scheme import Scheme
from equinorm.quantization.smoothing import smooth

__all__ = ["Clamp", "Preparation", "Scheme", "prepare", "settle_", "smooth"]
