"""What lies below the lowest edit, computed once per example and kept."""
