"""negCLIPLoss, and its selection from 8-bit products."""
