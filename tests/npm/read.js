// An independent reader (dcmjs) of results, for the tests.
//
//   node read.js FILE...    prints one JSON object for each file, a line each:
//     SEG: segments by number, and for each frame its segment, position, source image and number of voxels set
//     SR:  numbers with name, unit and value; the segments that groups refer to
'use strict';

const fs = require('fs');
const dcmjs = require('dcmjs');

dcmjs.log.setLevel('silent');
const { BitArray, DicomMessage, DicomMetaDictionary } = dcmjs.data;

function list(value) {
  return value === undefined || value === null ? [] : Array.isArray(value) ? value : [value];
}

function first(value) {
  return list(value)[0];
}

function segmentation(ds) {
  const bits = BitArray.unpack(first(ds.PixelData));
  const size = ds.Rows * ds.Columns;
  const frames = list(ds.PerFrameFunctionalGroupsSequence).map((group, index) => ({
    segment: first(group.SegmentIdentificationSequence).ReferencedSegmentNumber,
    position: list(first(group.PlanePositionSequence).ImagePositionPatient).map(Number),
    source: first(first(group.DerivationImageSequence).SourceImageSequence).ReferencedSOPInstanceUID,
    voxels: bits.subarray(index * size, (index + 1) * size).reduce((sum, bit) => sum + (bit ? 1 : 0), 0),
  }));
  const segments = {};
  for (const item of list(ds.SegmentSequence)) segments[item.SegmentNumber] = item.SegmentLabel;
  return { segments, frames };
}

function report(ds) {
  const numbers = [];
  const referenced = [];
  const texts = [];
  (function walk(item) {
    if (item.ValueType === 'NUM') {
      const measured = first(item.MeasuredValueSequence);
      numbers.push({
        name: first(item.ConceptNameCodeSequence).CodeMeaning,
        value: Number(measured.NumericValue),
        unit: first(measured.MeasurementUnitsCodeSequence).CodeValue,
      });
    }
    if (item.ValueType === 'TEXT') texts.push(item.TextValue);
    for (const reference of list(item.ReferencedSOPSequence)) {
      if (reference.ReferencedSegmentNumber !== undefined) {
        referenced.push([reference.ReferencedSOPInstanceUID, Number(reference.ReferencedSegmentNumber)]);
      }
    }
    list(item.ContentSequence).forEach(walk);
  })(ds);
  return { numbers, referenced, texts };
}

for (const file of process.argv.slice(2)) {
  const bytes = fs.readFileSync(file);
  const message = DicomMessage.readFile(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length));
  const ds = DicomMetaDictionary.naturalizeDataset(message.dict);
  const what = ds.Modality === 'SEG' ? segmentation(ds) : ds.Modality === 'SR' ? report(ds) : {};
  console.log(JSON.stringify({ modality: ds.Modality, uid: ds.SOPInstanceUID, ...what }));
}
