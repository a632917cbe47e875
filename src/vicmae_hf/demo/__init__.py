"""The page of `vicmae demo`: what a checkpoint makes of a file that a visitor uploads. `checkpoint.py` opens the
checkpoint, `answers.py` reads the file and computes what the page shows, `neighbours.py` encodes a folder once,
`page.py` is the page (Gradio, an extra).
"""
