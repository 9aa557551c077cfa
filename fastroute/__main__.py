from fastroute.cli import main

main()
