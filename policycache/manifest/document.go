package manifest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"

	"go.yaml.in/yaml/v2"
)

// document is one non-empty document of a file, converted to JSON.
type document struct {
	// number counts the file's documents from 1, empty ones included.
	number int
	json   []byte
	// flaws are what is wrong with a document that could be read all the same:
	// keys that appear twice, as "line 5: key ... already set in map".
	flaws []string
}

// split gives a file's documents, and the error at which reading stopped.
//
// A file is tried as JSON first (one value or several in a row), because JSON
// may be indented with tabs, which YAML refuses, and because it is read much
// faster so. Whatever isn't JSON is YAML, of which kubectl's dialect is read
// (YAML 1.1, where yes and no are booleans).
func split(data []byte) ([]document, error) {
	data = bytes.TrimPrefix(data, []byte("\xef\xbb\xbf"))
	if docs, ok := splitJSON(data); ok {
		return docs, nil
	}
	return splitYAML(data)
}

// splitJSON reads a row of JSON objects. It is false for anything else, an
// empty file included.
func splitJSON(data []byte) (docs []document, ok bool) {
	if !bytes.HasPrefix(bytes.TrimLeft(data, " \t\r\n"), []byte("{")) {
		return nil, false
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	for n := 1; ; n++ {
		var raw json.RawMessage
		switch err := dec.Decode(&raw); err {
		case nil:
			docs = append(docs, document{number: n, json: raw})
		case io.EOF:
			return docs, true
		default:
			return nil, false
		}
	}
}

// splitYAML leaves it to the YAML parser itself to find the documents' ends, so
// that "---", "..." and comments mean what YAML says, content that no document
// ends before is an error, and errors carry the file's own line numbers.
func splitYAML(data []byte) (docs []document, err error) {
	dec := yaml.NewDecoder(bytes.NewReader(data))
	dec.SetStrict(true)
	for n := 1; ; n++ {
		var value any
		err := dec.Decode(&value)
		if err == io.EOF {
			return docs, nil
		}
		// A TypeError, which here means doubled keys, comes after the whole
		// document was read; any other error ends the stream.
		var doubled *yaml.TypeError
		if err != nil && !errors.As(err, &doubled) {
			return docs, fmt.Errorf("document %d: %w", n, err)
		}
		if value == nil {
			continue
		}
		raw, err := toJSON(value)
		if err != nil {
			return docs, fmt.Errorf("document %d: %w", n, err)
		}
		doc := document{number: n, json: raw}
		if doubled != nil {
			doc.flaws = doubled.Errors
		}
		docs = append(docs, doc)
	}
}

func toJSON(value any) ([]byte, error) {
	value, err := jsonable(value)
	if err != nil {
		return nil, err
	}
	raw, err := json.Marshal(value)
	if err != nil {
		return nil, fmt.Errorf("can't be written as JSON: %w", err)
	}
	return raw, nil
}

// jsonable turns YAML's maps, whose keys may be of any type, into JSON's.
func jsonable(value any) (any, error) {
	switch v := value.(type) {
	case map[any]any:
		object := make(map[string]any, len(v))
		for k, item := range v {
			key, err := jsonKey(k)
			if err != nil {
				return nil, err
			}
			// 80 and "80" are two keys in YAML and one in JSON.
			if _, twice := object[key]; twice {
				return nil, fmt.Errorf("key %q appears twice", key)
			}
			if object[key], err = jsonable(item); err != nil {
				return nil, err
			}
		}
		return object, nil
	case []any:
		list := make([]any, len(v))
		for i, item := range v {
			var err error
			if list[i], err = jsonable(item); err != nil {
				return nil, err
			}
		}
		return list, nil
	}
	return value, nil
}

func jsonKey(k any) (string, error) {
	switch k := k.(type) {
	case string:
		return k, nil
	case bool:
		return strconv.FormatBool(k), nil
	case int:
		return strconv.Itoa(k), nil
	case float64:
		return strconv.FormatFloat(k, 'g', -1, 64), nil
	}
	return "", fmt.Errorf("key %v is neither a string nor a number", k)
}
