"""Networks, and what runs on them, where that is more than a method's file should hold."""
