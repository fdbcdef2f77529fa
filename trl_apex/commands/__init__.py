"""The commands of `trl-apex`, one a module, each with `run(arguments)`. Imported only when used."""
