"""Help pages of the commands. They are kept as texts, so that `vicmae COMMAND --help` imports nothing."""
