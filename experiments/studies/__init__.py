"""Studies of the library's methods: many short runs, a table, plots."""
