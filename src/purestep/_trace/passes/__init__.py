"""The passes between a graph and the source of a program, in the order in which `purestep._trace.program.compile` runs them."""
