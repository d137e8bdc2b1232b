"""What people look at: terminal tables and one HTML page. Reads result documents only; no torch."""
