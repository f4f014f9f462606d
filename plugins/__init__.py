"""Custom operators, one folder each: declaration, numpy reference, ONNX function body."""
