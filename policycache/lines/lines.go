// Package lines reads text that has one item a line, such as JSON lines, from
// sources that may hold anything.
package lines

import (
	"bufio"
	"errors"
	"fmt"
)

// Longest is the most bytes that a line may have. What a question or a record
// needs fits in a few hundred.
const Longest = 1 << 20

// Read appends a line, with its line end if it has one, to buf. A line that is
// too long is read to its end and given up with lineErr. A readErr, io.EOF
// included, may come with a last line.
func Read(r *bufio.Reader, buf []byte) (line []byte, lineErr, readErr error) {
	for {
		part, err := r.ReadSlice('\n')
		if len(buf)+len(part) > Longest {
			lineErr = fmt.Errorf("longer than %d bytes", Longest)
			buf = buf[:0]
		}
		if lineErr == nil {
			buf = append(buf, part...)
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return buf, lineErr, err
		}
	}
}
