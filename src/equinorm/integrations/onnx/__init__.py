"""ONNX files as modules, and back. Needs the packages onnx and onnxruntime.

Takes an .onnx file. Gives a module that computes what it does, and the same file with other weights. Never imports cli; of what
ENorm does it imports nothing.
"""

from equinorm.integrations.onnx.errors import OnnxError
from equinorm.integrations.onnx.module import OnnxModule
from equinorm.integrations.onnx.reading import OnnxFile, input_names, read
from equinorm.integrations.onnx.writing import Written, write

__all__ = ["OnnxError", "OnnxFile", "OnnxModule", "Written", "input_names", "read", "write"]
