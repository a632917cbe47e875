"""What training asks of its devices: threads, compiled layers, a model sharded over processes."""
