"""What several test files share: methods, files, servers and runs made for the tests."""
