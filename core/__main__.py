from ampcheck.cli import main

main()
