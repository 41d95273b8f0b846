package explain

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"

	kjson "sigs.k8s.io/json"

	"portcullis/policycache/lines"
)

// errorLine stands in a batch's output for a line that can't be answered.
type errorLine struct {
	Line  int    `json:"line"`
	Error string `json:"error"`
}

// Batch reads questions, one JSON object a line, and writes for each one JSON
// line in the same order: the answer, or {"line":N,"error":"..."} with the line
// counted from 1. Blank lines are counted and passed over. Bad is the number
// of error lines; err is a failure to read or to write. What was answered
// before a failure to read has been written.
//
// Answers are handed on whenever no more input is at hand, so that a program
// may ask and wait for the answer.
func (c *Cluster) Batch(in io.Reader, out io.Writer) (bad int, err error) {
	r := bufio.NewReaderSize(in, 64<<10)
	w := bufio.NewWriterSize(out, 64<<10)
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	var buf []byte
	for n := 1; ; n++ {
		if mayWait(r) {
			if err := w.Flush(); err != nil {
				return bad, fmt.Errorf("writing answers: %w", err)
			}
		}
		line, lineErr, readErr := lines.Read(r, buf[:0])
		buf = line
		var answer any
		if lineErr == nil && len(bytes.TrimSpace(line)) > 0 {
			answer, lineErr = c.answer(line)
		}
		if lineErr != nil {
			bad++
			answer = errorLine{n, lineErr.Error()}
		}
		if answer != nil {
			if err := enc.Encode(answer); err != nil {
				return bad, fmt.Errorf("writing answers: %w", err)
			}
		}
		if readErr != nil {
			return bad, finish(w, readErr)
		}
	}
}

// mayWait tells whether the next line may have to be waited for.
func mayWait(r *bufio.Reader) bool {
	ahead, _ := r.Peek(r.Buffered()) // what is buffered can always be peeked
	return bytes.IndexByte(ahead, '\n') < 0
}

// finish writes out what is buffered once reading has ended, well or not.
func finish(w *bufio.Writer, readErr error) error {
	if err := w.Flush(); err != nil {
		return fmt.Errorf("writing answers: %w", err)
	}
	if readErr != io.EOF {
		return fmt.Errorf("reading connections: %w", readErr)
	}
	return nil
}

// question is a line of a batch.
type question struct {
	From     string          `json:"from"`
	To       string          `json:"to"`
	Protocol string          `json:"protocol"`
	Port     json.RawMessage `json:"port"`
}

// answer answers one line of a batch.
func (c *Cluster) answer(line []byte) (*answerLine, error) {
	var q question
	strict, err := kjson.UnmarshalStrict(line, &q)
	if err != nil {
		return nil, jsonError(err)
	}
	if len(strict) > 0 {
		return nil, strict[0]
	}
	port, err := q.portText()
	if err != nil {
		return nil, err
	}
	switch {
	case q.From == "":
		return nil, errors.New(`"from" is missing`)
	case q.To == "":
		return nil, errors.New(`"to" is missing`)
	}
	a, err := c.Ask(Query{From: q.From, To: q.To, Protocol: q.Protocol, Port: port})
	if err != nil {
		return nil, err
	}
	l := newAnswerLine(&a, q.Port)
	return &l, nil
}

// portText gives the port as a user would type it, and clears one that is null
// so that it isn't echoed.
func (q *question) portText() (string, error) {
	raw := string(q.Port)
	switch {
	case raw == "" || raw == "null":
		q.Port = nil
		return "", nil
	case raw[0] == '"':
		var s string
		if err := json.Unmarshal(q.Port, &s); err != nil {
			return "", fmt.Errorf("bad port %s: %w", quote(raw), err)
		}
		return s, nil
	}
	if _, err := strconv.ParseUint(raw, 10, 16); err != nil {
		return "", fmt.Errorf("bad port %s: want 1 to 65535, or the name of a port of the destination pod", quote(raw))
	}
	return raw, nil
}

// jsonError says what is wrong with a line's JSON in the words of one who
// writes JSON, not Go.
func jsonError(err error) error {
	var wrong *json.UnmarshalTypeError
	if errors.As(err, &wrong) {
		if wrong.Field == "" {
			return fmt.Errorf("want a JSON object, got %s", wrong.Value)
		}
		return fmt.Errorf("field %q must be a string, got %s", wrong.Field, wrong.Value)
	}
	return fmt.Errorf("not JSON: %w", err)
}
