"""Trained U-Nets as ONNX files and TensorRT engines, and the runtimes that compute them."""
