"""Forms of a trained model for use: ONNX, torch.export, half precision."""
