"""Where people look at runs: files of the run, Weights & Biases, TensorBoard, MLflow, their own."""
