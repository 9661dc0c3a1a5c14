"""What ``hubrl export`` is made of: an agent's outputs, the ONNX graph, play, distillation."""
