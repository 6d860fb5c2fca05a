"""Methods that a quality table puts side by side: one file each."""
