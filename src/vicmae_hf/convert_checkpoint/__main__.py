"""`python -m vicmae_hf.convert_checkpoint`: as `vicmae convert`."""

from .conversion import main


if __name__ == "__main__":
    main()
