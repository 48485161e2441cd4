from cibr.cli import main

main()
