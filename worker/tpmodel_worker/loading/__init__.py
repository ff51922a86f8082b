"""From checkpoint files to a rank's weights arena."""
