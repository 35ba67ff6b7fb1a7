"""Commands of progress_utils.py. Each module defines add_arguments(parser) and run(arguments) -> exit code."""
