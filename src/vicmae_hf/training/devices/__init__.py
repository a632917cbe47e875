"""What training asks of its devices: threads, compiled layers, a model divided between processes."""
