"""Going faster without another result: what lies below the lowest edit, computed once per example and kept."""
