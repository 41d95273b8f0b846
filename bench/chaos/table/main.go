// Table prints what the fault tests found: the file that CHAOS_ROWS named.
package main

import (
	"fmt"
	"os"

	"portcullis/bench/chaos"
)

func main() {
	if err := run(os.Args); err != nil {
		fmt.Fprintln(os.Stderr, "table:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 2 {
		return fmt.Errorf("want one file of rows")
	}
	f, err := os.Open(args[1])
	if err != nil {
		return err
	}
	defer f.Close()
	rows, err := chaos.Read(f)
	if err != nil {
		return err
	}
	return chaos.Write(os.Stdout, rows)
}
