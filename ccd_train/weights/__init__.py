"""Weights in and out: backbones, recognisers, ONNX and TorchScript."""
