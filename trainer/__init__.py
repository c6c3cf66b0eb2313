"""How a CLIP is trained: Lightning module, loss, schedule, run directories, commands."""
