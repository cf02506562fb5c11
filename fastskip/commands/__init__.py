"""One module a subcommand. Heavy imports happen inside the functions, so that help is instant."""
