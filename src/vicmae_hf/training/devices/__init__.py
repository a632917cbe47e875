"""What training asks of its devices: threads, compiled layers, sharded models; and what their peaks are."""
