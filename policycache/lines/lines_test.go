package lines

import (
	"bufio"
	"fmt"
	"io"
	"strings"
	"testing"
)

// Lines come one by one whatever the reader's buffer holds; one that is too
// long is given up whole, and the next is read.
func TestRead(t *testing.T) {
	long := strings.Repeat("x", Longest)
	r := bufio.NewReaderSize(strings.NewReader("a\n\n"+long+"y\n"+long[:Longest-1]+"\n"+strings.Repeat("b", 100)), 16)
	var got []string
	for {
		line, lineErr, readErr := Read(r, nil)
		got = append(got, fmt.Sprint(len(line), lineErr != nil, readErr))
		if readErr != nil {
			break
		}
	}
	want := fmt.Sprint([]string{"2 false <nil>", "1 false <nil>", "0 true <nil>", fmt.Sprint(Longest, " false <nil>"), fmt.Sprint("100 false ", io.EOF)})
	if fmt.Sprint(got) != strings.ReplaceAll(want, "  ", " ") {
		t.Errorf("got %v, want %v", got, want)
	}
}
