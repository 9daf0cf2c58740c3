"""Run folders: making and finding them, the models a run needs first, its report."""
