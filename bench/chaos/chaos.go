// Package chaos collects what the fault tests found, for one table: which fault,
// under what load, how many connections were tried, how many of them met something
// else than policy says, and how many decisions were neither logged nor counted.
//
// A fault test is an ordinary test named TestFault… that calls Report once for each
// fault when it is over; `make chaos` runs them all and prints the table.
package chaos

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"testing"
	"text/tabwriter"
)

// RowsEnv names the file that rows are added to; without it Report writes to the
// test's log alone.
const RowsEnv = "CHAOS_ROWS"

// Unknown stands for a count that the fault leaves nobody to take, such as what a
// killed agent had not written yet.
const Unknown = -1

// Row is what became of one fault.
type Row struct {
	Fault string // what was done
	Load  string // what was going on meanwhile, and was held
	Tried int    // connections, or packets where the fault is made of packets
	Wrong int    // of those, how many were let through or stopped against policy
	Lost  int    // decisions that were neither logged nor counted as lost; or Unknown
	Note  string // what else was measured, in a few words
}

// Report adds a row. Whether its figures are good enough is the test's to say; a
// wrong verdict or a lost record never is, so those fail the test here.
func Report(t testing.TB, r Row) {
	t.Helper()
	if r.Wrong > 0 {
		t.Errorf("%s: %d of %d went against policy", r.Fault, r.Wrong, r.Tried)
	}
	if r.Lost > 0 {
		t.Errorf("%s: %d decisions were neither logged nor counted", r.Fault, r.Lost)
	}
	if r.Tried == 0 {
		t.Errorf("%s: nothing was tried", r.Fault)
	}
	t.Logf("%+v", r)
	path := os.Getenv(RowsEnv)
	if path == "" {
		return
	}
	line, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Write(append(line, '\n')); err != nil {
		t.Error(err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
}

// Read reads the rows that Report wrote, in order of the faults' names.
func Read(r io.Reader) (rows []Row, err error) {
	for dec := json.NewDecoder(r); ; {
		var row Row
		switch err := dec.Decode(&row); err {
		case nil:
			rows = append(rows, row)
		case io.EOF:
			slices.SortStableFunc(rows, func(a, b Row) int { return strings.Compare(a.Fault, b.Fault) })
			return rows, nil
		default:
			return nil, fmt.Errorf("read rows: %w", err)
		}
	}
}

// Write prints the table.
func Write(w io.Writer, rows []Row) error {
	tab := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tab, "FAULT\tLOAD HELD\tTRIED\tWRONG\tLOST\tNOTE")
	for _, r := range rows {
		lost := fmt.Sprint(r.Lost)
		if r.Lost == Unknown {
			lost = "-"
		}
		fmt.Fprintf(tab, "%s\t%s\t%d\t%d\t%s\t%s\n", r.Fault, r.Load, r.Tried, r.Wrong, lost, r.Note)
	}
	return tab.Flush()
}
