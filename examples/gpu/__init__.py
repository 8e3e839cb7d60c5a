"""The parts of examples/gpu_queue.py."""
