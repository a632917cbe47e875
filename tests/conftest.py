import torch


# The models here are too small for threads, which would only fight with those of other processes.
torch.set_num_threads(1)
