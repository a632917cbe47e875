"""What every command has around its work: how it is called, how it ends, and what a training needs besides."""
